"""Word lists of the recipe: open vocabulary (copied, never understood) and closed facts."""

from __future__ import annotations

COMMON_HAN = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过"
    "发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本"
    "前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很"
    "最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度"
    "门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电"
    "数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马"
    "科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万"
    "取拉格望觉术领共确传师观清今切院让识候带导争运笔组写早近兴士怎六七八九百千亿零红绿蓝黄黑紫花"
    "草树木林森河湖江雨雪风云雷火土石星月亮晚春夏秋冬鸟鱼虫猫狗牛羊猪鸡鸭虎龙蛇兔鼠猴熊狼茶酒米面"
    "饭菜肉蛋奶糖盐油果苹梨桃瓜豆杯盘碗桌椅床灯窗墙房屋车船飞票站街桥店城镇村园医药病吃喝睡跑跳唱"
    "歌舞画读买卖送找帮爱笑哭快乐悲喜怒忙累困热冷暖凉轻短宽深浅干湿软硬甜酸苦辣香臭左右旁爸妈哥姐"
    "弟妹爷朋友孩男王李赵钱孙周吴郑陈刘杨朱许何吕施曹严魏姜谢邹章潘葛范彭鲁韦苗方俞袁柳史唐费薛贺"
    "伟芳娜敏静丽磊洋勇艳杰涛超霞刚玲婷宇浩轩涵欣怡梓晨佳琪思雅诗梦泽俊博文昊然瑞鑫鹏飞斌凯旋"
)

ZH_PHRASES = (
    "苹果 香蕉 西瓜 葡萄 桌子 椅子 电脑 手机 书包 铅笔 老师 学生 医生 朋友 今天 明天 昨天 早上 晚上 "
    "天气 太阳 月亮 星星 大海 高山 河流 森林 花园 城市 村庄 火车 飞机 汽车 轮船 面包 牛奶 鸡蛋 米饭 "
    "春天 夏天 秋天 冬天 红色 绿色 蓝色 快乐 开心 努力 学习 工作 休息 运动 音乐 电影 足球 篮球 下雨 "
    "下雪 刮风 一路平安 万事如意 心想事成 生日快乐 新年快乐 恭喜发财 马到成功 画龙点睛 水落石出 风和日丽 "
    "收到 明白 知道 可以 没问题 马上来 谢谢你 辛苦 加油 再见 晚安 早安 测试 成功 完成 开始 结束 继续"
).split()

EN_WORDS = (
    "apple banana cherry orange lemon grape peach melon berry mango table chair lamp window door floor "
    "river ocean mountain valley forest desert island beach bridge tower castle garden street market "
    "school office hotel station airport museum library kitchen bedroom bottle basket bucket candle "
    "carpet curtain mirror pillow blanket hammer ladder needle rocket robot camera guitar violin piano "
    "trumpet drum flute tiger lion zebra monkey rabbit turtle dolphin whale shark eagle parrot pigeon "
    "spider beetle butter cheese bread honey sugar pepper salt coffee water juice soup salad pizza "
    "pasta sandwich cookie cake candy chocolate silver golden copper iron stone crystal diamond pearl "
    "cotton velvet leather paper pencil crayon marker notebook folder ticket wallet jacket sweater "
    "shirt trousers socks shoes boots gloves scarf helmet bicycle truck train plane ship boat wagon "
    "engine wheel brake pedal planet comet galaxy meteor thunder lightning rainbow shadow breeze storm "
    "winter summer autumn spring morning evening midnight happy gentle brave clever quiet noisy purple "
    "yellow crimson violet amber jungle meadow canyon harbor village cottage palace temple statue "
    "painting poem novel puzzle riddle secret magic wizard dragon knight princess pirate sailor farmer "
    "doctor teacher lawyer painter singer dancer writer baker tailor soldier captain budget invoice "
    "parcel salary schedule meeting project report document password account balance payment playlist "
    "recipe calendar reminder contact score level status temperature humidity speed distance weight "
    "height volume price stock rate size color shape title author genre length width depth angle "
    "fox jumps runs sings sleeps walks reads writes cooks paints builds opens closes finds keeps"
).split()

# The words of the phrasings, each a single token: always on the training side of the split.
PHRASE_WORDS = (
    "able about add additionalproperties after afternoon again aires am america amsterdam an and "
    "ankara answer appear april are argentina arguments array as ask asks assistant athens august "
    "australia austria away backwards baghdad bangkok be before beijing belgium berlin bern better "
    "body book boolean born bot brasilia brazil briefly brussels bucharest budapest buddy buenos "
    "build by bye cairo calculate call can canada canberra cancel capital care celsius change check "
    "chile china city comes compute concise content convert copenhagen copy count create cuba current "
    "day dear december delete delhi demo denmark description did do does doing down dublin duration "
    "echo egypt eighth eleventh else email england enum evening exactly explain fahrenheit false "
    "february fetch fifth find fine finland first fits five follow following follows for four fourth "
    "france french friday friend friendly from function german germany get getweather give going good "
    "goodbye great greece greetings greets hanoi havana have hear hello help helpful helsinki hey hi "
    "history how hungary in india indonesia instructions integer into introduce invented iran iraq "
    "ireland is it italy items jakarta january japan japanese json july june just keep kenya keys "
    "know korea kyiv language last later latin letter letters light like lima lisbon list location "
    "london long look lookup lot madrid mail make manila many march may me mean meet message mexico "
    "mind minus minute minutes model monday month morning morocco moscow much music must my nairobi "
    "name need netherlands next nice night ninth no none norway not nothing november now number "
    "numbers object october of oh ok old on only open order oslo other ottawa output parameters paris "
    "person peru philippines place play please plus poland polite portugal post price print "
    "properties put pymllm query qwen rabat raining read recipient remember repeat reply required "
    "respond result return reverse reversed right robot romania rome room run russia santiago "
    "saturday save say saying says search second secret see send seoul september set seventh should "
    "show sixth skills small so song spain spanish spell spelled start stock stockholm story string "
    "subtract sum sunday sweden switch switzerland symbol system take target tehran tell tenth text "
    "thailand than thank thanks that the then there these think third this three thursday ticker time "
    "timer times timezone tiny title to today tokyo tomorrow tool tools toy translate true tuesday "
    "turkey turn twelfth two type ukraine um unit units up update use user values very vienna vietnam "
    "want warsaw was washington weather web wednesday week welcome well what when where which who "
    "whole why will with word words work write wrote year you your yourself"
).split()

NAMES = (
    "Tom Anna Peter Lucy Mark Julia David Emma Oliver Sophia Liam Mia Noah Ella Jack Grace Henry Chloe "
    "Leo Zoe Max Ruby Sam Alice Ben Clara Daniel Eva Felix Hanna Ivan Jane Kevin Laura Martin Nina Oscar "
    "Paula Robert Sara Simon Tina Victor Wendy Xavier Yara Zack Maria Carlos Diego Elena Fatima Hugo Ines"
).split()

ZH_SURNAMES = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗"
ZH_GIVEN = "伟芳娜敏静丽强磊军洋勇艳杰涛明超霞平刚玲婷宇浩轩涵欣怡晨佳琪雅诗梦泽俊博文昊瑞鑫鹏飞"

EMOJI = "😀😂😍👍🎉🚀🔥🌟🍎🐱🐶🌈💡✅❤⭐☀🙂🎵📷"

CAPITALS = (
    ("France", "Paris", "法国", "巴黎"), ("Germany", "Berlin", "德国", "柏林"),
    ("Italy", "Rome", "意大利", "罗马"), ("Spain", "Madrid", "西班牙", "马德里"),
    ("Portugal", "Lisbon", "葡萄牙", "里斯本"), ("England", "London", "英国", "伦敦"),
    ("Ireland", "Dublin", "爱尔兰", "都柏林"), ("Austria", "Vienna", "奥地利", "维也纳"),
    ("Switzerland", "Bern", "瑞士", "伯尔尼"), ("Belgium", "Brussels", "比利时", "布鲁塞尔"),
    ("Netherlands", "Amsterdam", "荷兰", "阿姆斯特丹"), ("Denmark", "Copenhagen", "丹麦", "哥本哈根"),
    ("Sweden", "Stockholm", "瑞典", "斯德哥尔摩"), ("Norway", "Oslo", "挪威", "奥斯陆"),
    ("Finland", "Helsinki", "芬兰", "赫尔辛基"), ("Poland", "Warsaw", "波兰", "华沙"),
    ("Hungary", "Budapest", "匈牙利", "布达佩斯"), ("Greece", "Athens", "希腊", "雅典"),
    ("Turkey", "Ankara", "土耳其", "安卡拉"), ("Russia", "Moscow", "俄罗斯", "莫斯科"),
    ("Ukraine", "Kyiv", "乌克兰", "基辅"), ("Romania", "Bucharest", "罗马尼亚", "布加勒斯特"),
    ("China", "Beijing", "中国", "北京"), ("Japan", "Tokyo", "日本", "东京"),
    ("Korea", "Seoul", "韩国", "首尔"), ("India", "Delhi", "印度", "新德里"),
    ("Thailand", "Bangkok", "泰国", "曼谷"), ("Vietnam", "Hanoi", "越南", "河内"),
    ("Indonesia", "Jakarta", "印度尼西亚", "雅加达"), ("Philippines", "Manila", "菲律宾", "马尼拉"),
    ("Iran", "Tehran", "伊朗", "德黑兰"), ("Iraq", "Baghdad", "伊拉克", "巴格达"),
    ("Egypt", "Cairo", "埃及", "开罗"), ("Kenya", "Nairobi", "肯尼亚", "内罗毕"),
    ("Morocco", "Rabat", "摩洛哥", "拉巴特"), ("Canada", "Ottawa", "加拿大", "渥太华"),
    ("Mexico", "Mexico City", "墨西哥", "墨西哥城"), ("Cuba", "Havana", "古巴", "哈瓦那"),
    ("Brazil", "Brasilia", "巴西", "巴西利亚"), ("Argentina", "Buenos Aires", "阿根廷", "布宜诺斯艾利斯"),
    ("Chile", "Santiago", "智利", "圣地亚哥"), ("Peru", "Lima", "秘鲁", "利马"),
    ("Australia", "Canberra", "澳大利亚", "堪培拉"), ("America", "Washington", "美国", "华盛顿"),
)  # fmt: skip

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ZH_DAYS = tuple("星期" + day for day in "一二三四五六日")
MONTHS = ("January February March April May June July August September October November December").split()
ZH_MONTHS = tuple(month + "月" for month in "一 二 三 四 五 六 七 八 九 十 十一 十二".split())
ORDINALS = ("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth").split()
EN_TIMES = {2: "two", 3: "three", 4: "four", 5: "five"}
ZH_TIMES = {2: "两", 3: "三", 4: "四", 5: "五"}
